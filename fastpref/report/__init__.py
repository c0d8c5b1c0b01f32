"""Pages of what was trained: they read the files of runs, never a trainer's state. Nothing here imports training."""
