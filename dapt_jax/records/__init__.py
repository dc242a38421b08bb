"""The files of a workdir: ledger, results, predictions, vocabulary; read and written without JAX."""
