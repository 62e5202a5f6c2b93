"""Tasks of lm-evaluation-harness with our model as its model class; they are named lm/piqa, lm/hellaswag and so on.

    tasks.py      a task by its name, its documents from the hub, a cache or local files
    model.py      what the harness asks of a model, answered by a Reader
    questions.py  a whole task as one piece of work: asked context by context, then scored by the harness itself

Only model.py imports the harness when it is imported.
"""
