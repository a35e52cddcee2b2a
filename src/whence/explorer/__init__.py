"""The live pages: one model and its indexes, answered from memory, for anybody who has the page open.

In the order in which a question goes through them:

    requests        what a page may ask, and how large it may be
    security        who may ask: loopback and this page alone, or whoever has the token
    app             the addresses, and what each of them calls
    waiting_line    one model, many viewers: a line with places that can be left
    answers         a prompt becomes an answer, token by token, and its tokens scores of every row
    corpus_rows     the rows in memory: filters, search, duplicates
    ranking         the best and the worst rows of some scores
    verbatim        what of an answer stands word for word in the corpus
    views           from numbers to what a page shows
    exports         the same as files, as a command and as Python
    serving         the server, and the address to open
    pages/          what the browser runs
"""
