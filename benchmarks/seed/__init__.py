"""The parts of seedtable.py: rows and their processes, the load, the questions, and the report."""
