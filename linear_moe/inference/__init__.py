"""Use a trained model: load it from its run folder alone, continue prompts on its recurrent state, score texts."""
