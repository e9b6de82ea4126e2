"""Instruction data: conversations from JSONL, their tokens with the answers marked, packs of whole samples."""
