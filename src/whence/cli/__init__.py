"""The command line: each verb parses its flags, calls one library function, and prints what comes back.

    app             the verbs together, their messages and exit codes
    options         flags that several verbs have, each declared once; texts such as NAME=VALUE parsed
    groups          several flags as one dataclass
    indexing, tracing, training, selection, recovery, ablation, mixing, evaluation     the verbs of each package
    console         results to stdout, progress and messages to stderr
    demonstration   `whence demo`: a small model that learned Python's docstrings, asked where it learned each

Nothing is computed here, and torch is imported by a verb when it runs, so that `--help` answers at once.
"""
