"""Many prompts to many images: rows.py -> plan.py -> generate.py -> writing.py, driven by local.py.

    PROMPTS -> rows by number -> shards of consecutive rows -> batches of one size -> images -> DIR/train-...tar

A row's batch follows from the rows alone, and a shard takes its name in one step when it is whole. So whatever ended
a run, the same command goes on, and the files are the same to the byte.
"""
