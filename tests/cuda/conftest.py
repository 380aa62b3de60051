"""These tests need a GPU: where there is none, nothing here is collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
