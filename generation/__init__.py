"""The layer under every front end: what was asked for, running it, and what came of it.

`requests` say what is wanted, `models` what the model is, `levers` what makes it faster, `machine` where it can run;
`job` is all of that, checked. `run` does it, `api` is the whole of it as `vidaccel.generate`. `forecast` tells
beforehand what a video will take. `report` shows what was made, `media` reads and writes it. `errors` carry a field of
the request, and each front end has its own word for it.
"""
