"""Python files of a checkpoint in the shape of Kimi-Audio's: copied into it, run by transformers from there."""
