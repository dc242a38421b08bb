"""Processes, device meshes, preemption, storage and files: what a study runs on."""
