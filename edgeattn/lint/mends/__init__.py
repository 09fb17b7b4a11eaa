"""Safe mends that ``edgeattn lint --fix`` shows, beside those that targets have for themselves. One file a mend.

Each has ``mend(module, precision) -> int``, which rewrites a captured graph in place and returns how many places it
changed. No lowering applies them: what they do is for the model's author to write.
"""
