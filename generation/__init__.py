"""The layer under every front end: what was asked for, running it, and what came of it.

`request` says what is wanted, `model_facts` what the model is, `methods` and `machine` how and where it can be done;
`job` is all of that, checked. `run` does it, `api` is the whole of it as `vidaccel.generate`. `forecast` tells
beforehand what a video will take. `comparison`, `report`, `figures`, `video` and `pictures` show what was made and read
what is given. `errors` carry a field of the request, and each front end has its own word for it.
"""
