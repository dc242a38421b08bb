"""What must not change without being announced: records of four tiny studies, plans and error lines.

    python -m tests.golden                            compares the code with the golden files
    python -m tests.golden --regenerate PART ...      writes them anew: a change that has to be announced

The files lie beside this module. A name or a word that changes on purpose is an entry of `renamed.py` and
nothing else: the golden files stay as they were until the entries are many enough to be folded in by
regenerating. `interface.py` is the only module here that knows where the library keeps what.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
