"""What loss would a model have that is trained on a mixture of a corpus' partitions? Answered without that training.

One model is trained on each partition, from one parent; averages of these members rank the mixtures. In the order in
which data flows:

    member_training  trains the members of a pool, and with `--truth` real models on mixtures
    dry_run          `plan_pool`: what that would take
    pool             the members on disk
    candidates       the mixtures to be judged
    mixtures         weights by partition: checked, or by name
    gram_matrices    matrices of the inputs of members' linear layers, for
    averages         the weighted mean and RegMean of one parameter
    merging          a mixture's merged model, parameter by parameter
    mixed_model      a loaded model that becomes one mixture after the other
    merged_files     a merged model as files
    heldout_losses   losses on evaluation sets, stored by content
    rank_agreement   how well a proxy ranks candidates against real trainings
    pipeline         `whence.ablate`: all of it
    suggestion       `whence.suggest`: the best mixture, by descent through merged models

It never claims the level of a real model's loss, only the order of mixtures, and never trains a finished member again.
"""
