"""The folder that ``transformers`` opens with ``trust_remote_code`` for models that none of its classes fits.

model/        the exported model, as it stands in a folder but for its imports
bundle.py     writes it there, with the mixers and kernels that it uses
describe.py   its config.json, from what Megatron builds the model from
names.py      its tensors' names
"""

from linear_moe.checkpoint.remote.bundle import write_code
from linear_moe.checkpoint.remote.describe import facts, hf_config
from linear_moe.checkpoint.remote.names import MixerRow, mixer_rows

__all__ = ["MixerRow", "facts", "hf_config", "mixer_rows", "write_code"]
