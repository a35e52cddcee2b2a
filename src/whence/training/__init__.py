"""Fine-tune a model so that its data can be traced afterwards: checkpoints with moments, in a directory that is a Run.

In the order in which data flows:

    recipe         the settings of a training, their checks and presets
    trainer        `train`: rows are tokenised as an index does it, and a Hugging Face Trainer trains on them
    online_mixing  optional: chooses the domain that each step's rows come from, by the losses so far
    in_run         optional: measures what each row does to a validation loss while the model trains
    training_rows  the rows, tokenised into memory
    dry_run        `plan_training`: what a training would take, by a few of its steps
    left_out_rows  rows that leave a training while all others keep their places
    repetition     a training made again from its record, with all rows or without some
    resuming       a training that was stopped goes on, and ends with the weights it would have had

Any Trainer's output directory is a Run too; nothing elsewhere requires that a model was trained here. There is no
preference tuning, no packing of rows, and no training on several machines.
"""
