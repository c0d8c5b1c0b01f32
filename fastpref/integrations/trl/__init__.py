"""TRL with the fused head, in two ways; the losses, metrics and files stay TRL's.

    from fastpref.integrations.trl import patch           # one line: every TRL trainer with a fused LM head
    patch()

    from fastpref.integrations.trl import FusedDPOTrainer  # the fast path: instead of trl.DPOTrainer
    FusedDPOTrainer(model, ref_model, args=trl.DPOConfig(...), train_dataset=...).train()

`patch` (kernel.py) replaces the one function that computes token log-probs, so the gradient still waits for backward:
four GEMMs, or three where the residuals fit the budget. The trainers (trainers.py) compute the loss inside the model's
forward and have its gradients with it: three GEMMs.
"""

from .kernel import patch, unpatch
from .trainers import FusedDPOTrainer, FusedKTOTrainer

__all__ = ["FusedDPOTrainer", "FusedKTOTrainer", "patch", "unpatch"]
