"""The configuration of a run: one typed tree, and every check of it that needs no GPU.

architecture.py    the shape of one network, and the named sizes
layout.py          which rank is what, for student and teacher
layout_table.py    the same as a table
splits.py          into which shards and stages a network can be split
tree.py            the tree: every setting with its type, default and meaning
schema.py          the tree read as a flat list of dotted keys
load.py            recipe YAML, then key=value overrides, then the DeepSpeed JSON
deepspeed_json.py  the DeepSpeed JSON reconciled with the tree
ranges.py          allowed values of every number
check.py           checks of the whole configuration against the number of processes
cli.py             the arguments of tools/train.py and tools/plan.py
help.py            the tree as text for --help
nearest.py         what lies near a value that is not allowed

Nothing here imports torch, so that a mistake is found before anything expensive starts.
"""
