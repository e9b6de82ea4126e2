"""The exported model: its files are written into a Hugging Face folder, with the mixers and kernels that they use."""
