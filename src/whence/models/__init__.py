"""How a model is opened, which of its layers are traced, and what its files say about how it was trained.

Data flows through the modules in this order:

    runs         a training's directory as checkpoints in order, with the learning rate that led to each
    layers       the linear layers of a model, and the layers that a pattern names
    load_options the arguments by which every verb loads a model
    loading      a frozen model with its adapter and tokenizer, and digests of both
    hook_safety  a forward pass in which hooks on layers see every use of their weights, the same bytes each time
    generation   continuations of prompts
    moments      Adam's moments of a checkpoint, under the names of the layers
    weights      weights as files, read and written one tensor at a time
    rounding     saved weights rounded to fewer bits
    pairing      the parameters of two models side by side
    difference   theta_0 - theta_f of a fine-tuning, and how far rounding hides it

The package never computes a gradient, and it never unpickles anything but tensors.
"""
