"""Drop-in places in other trainers. Thin: each file can be deleted without touching the rest."""
