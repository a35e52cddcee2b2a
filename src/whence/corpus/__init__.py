"""Which rows a corpus holds, which token ids a row becomes, and which of those tokens are supervised.

Data flows through the modules in this order:

    reading        files, directories, data sets and rows in memory, as one ordered collection of examples
    missing        NaN, empty cells and Arrow's nulls as None
    layouts        which columns of a row hold its text: messages, prompt and completion, instruction, or plain text
    unread         columns that no layout reads, and rejected answers, named in a note
    templates      a tokenizer's chat template, another in its place, and the day that it writes
    conversations  messages and instructions as text, with what the assistant says in it
    tokens         token ids of a row with its supervised tokens, and batches of rows of similar length
    partitions     a corpus by the values of a column, and rows drawn for a token budget

The package never runs a model, and it reads a corpus as a stream: only partitions hold rows in memory.
"""
