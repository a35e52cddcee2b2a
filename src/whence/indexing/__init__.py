"""Build, store and search an index: a vector for each row of a corpus under each checkpoint of a run.

An index is complete or resumes; its bytes depend on corpus, run and settings, not on time or on interruptions. In the
order in which data flows:

    ingest        checks a corpus and copies its rows into parts
    vectors       settings, and what they make of examples: sketched gradients with norms, losses and statuses
    codecs        how a vector is stored, from float32 to one bit an entry
    shards        the file of a part's vectors under one checkpoint
    manifest      what is in an index, with checksums
    store         the directory: atomic commits, reading, scanning
    scan          exact top-k over all rows, by the products of `kernels` and `compiled`, in `threads`; rows of one bit
                  by `bit_planes` and `matrix_units`, from `rounding` and `addresses`, and exactly by `signed_sums`
    opening       an open index with its model, as queries need it
    memory        sizes in bytes, and the memory of this process
    pilot         some passes of a build, measured; `memory_bound` finds by it the passes that a bound allows
    preparation   what an index is made from, checked and loaded
    planning      `plan`: what an index would take
    build         `index`, `append` and `verify`: jobs that fill, extend and repair a store
    verification  checks every file against its checksum; `repair` mends those that can be
    speed         `bench`: indexing against a training step

Nothing here makes a query, chooses rows for training or explains a score: `tracing` and `selection` do.
"""
