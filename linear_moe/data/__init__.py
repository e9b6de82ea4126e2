"""Text to token files and back: corpora, tokenizers, Megatron's indexed format."""
