"""The folder that ``transformers`` opens with ``trust_remote_code`` for models that none of its classes fits."""

from linear_moe.checkpoint.remote.names import MixerRow, mixer_rows, model_rows

__all__ = ["MixerRow", "mixer_rows", "model_rows"]
