from __future__ import annotations

import torch

# The networks of the tests are tiny: a second thread costs them more than it gives, and much more
# where several test processes share the cores.
torch.set_num_threads(1)
