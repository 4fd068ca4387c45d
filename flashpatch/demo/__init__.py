"""`flashpatch demo`: the main job on real input, checked as it is shown.

One file per part (`embeddings`, `t5`, `training`), each with a function that measures, a record of
what was measured and a function that shows it; `run` strings them together.
"""
