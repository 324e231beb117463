"""What all tests share."""

import torch

torch.set_num_threads(1)  # for tensors as small as these, more threads only wait for each other
