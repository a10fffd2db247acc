"""Whether the model is still right: drift of inputs and scores."""
