"""Random tests that can run for as long as one likes.

    make fuzz FUZZ_SECONDS=600                    # the time is shared among all kinds
    make fuzz FUZZ_KIND=parity FUZZ_SECONDS=3600  # one kind
    make fuzz FUZZ_KIND=parity FUZZ_SEED=17       # one case again, as a failure prints it

A kind is a module with a function `case(seed)`, which builds everything out of that one integer and
raises if something is wrong. It prints what it tries; that is shown if it fails.

| kind | what a case does |
| --- | --- |
| `parity` | a conversation, with and without drafters: same text, scores, streams, caches, draws |
| `interruptions` | something raises in a generation: cache and models are good afterwards |
| `threads` | eight threads share models: each gets what it gets alone |
| `checkpoints` | a drafter's folder is broken: refused at loading, or it drafts losslessly |
| `memory` | generations with changing partners: nothing piles up |
| `kills` | a command is killed again and again: in the end, the files of an undisturbed run |

A sample of each, with fixed seeds, is part of the test suite (`test_samples.py`). Which drafts are
worth their time depends on the machine, and so do some of the paths that a seed takes; what comes
out must not.
"""
