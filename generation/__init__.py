"""The layer under every front end: what was asked for, running it, and what came of it.

`request` and `model_facts` say what is wanted and whether the model can do it, `run` does it, `forecast` tells
beforehand what it will take, `report`, `figures` and `video` show it. The command line, the ComfyUI nodes and Python
users share it.
"""
