"""The benchmark: what a trapped call costs, beside the kernel alone and beside the least that a listener can do.

``python -m integration.storm [--json FILE] [--plot FILE] [--peer COMMAND] [--quick]``, as root. All contestants run the
same compiled program (floor.c, calls.c) in containers of the same kind, in turns of some hundred calls, so that what
disturbs the machine disturbs all of them alike. Ratios count, not absolute times.

`workloads` says what is called, `contestants` and `agents` who answers, `rounds` takes turns, `figures` makes numbers
of samples, `crowd` measures many containers at once, `baseline` says what moved since the committed figures.
"""
