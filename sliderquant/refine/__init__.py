"""The learned method: what is learned in a layer, in a window of layers, and over the model."""
