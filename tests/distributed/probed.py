"""What DeepSpeed finds out once in every process: which of its compiled parts the machine could build."""

import deepspeed.ops

deepspeed.ops.__compatible_ops__  # noqa: B018
