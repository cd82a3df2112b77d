"""Is a run still what was written, and would it be written again?"""
