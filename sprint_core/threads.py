"""How the threads of the CPU wait for each other, which OpenMP reads from the environment when torch is imported.

By default they spin. On a machine that does anything else, a thread that has lost its core is then waited for by
others that spin on theirs. What passive waiting gains there, and what it costs an idle machine, is in
docs/benchmarks.md.
"""

WAIT_PASSIVELY = {"OMP_WAIT_POLICY": "PASSIVE"}
