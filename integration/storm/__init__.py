"""The benchmark: what a trapped call costs, beside the kernel alone and beside the least that a listener can do.

``python -m integration.storm [--json FILE] [--quick]``, as root. All contestants run the same compiled program
(floor.c, calls.c) in containers of the same kind, in turns of some hundred calls, so that what disturbs the machine
disturbs all of them alike. Ratios count, not absolute times.

`workloads` says what is called, `contestants` who answers, `rounds` takes turns, `figures` makes numbers of samples.
"""
