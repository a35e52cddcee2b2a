"""What a person reads of a result: tables in the terminal, pages and pictures, and rows as files.

A result of a verb comes in, as plain data; nothing is computed here that the result does not hold.

    text, tables, wide_table         untrusted text made safe; the style of all tables; a column for each evaluation set
    trace_tables, index_tables, ...  VERB_tables: what each verb prints
    svg, heat_map                    pieces of pictures
    page                             what all pages share: the document, its policy, sections, rows of a corpus
    trace_page, select_page, ...     VERB_page: a self-contained HTML file, made of the .css, .js and .html beside it
    files                            rows as .jsonl, .csv or .parquet, pages as .html; whole or not at all

To add a report: `VERB_tables(result)` in VERB_tables.py, `VERB_page(result)` in VERB_page.py, and two calls in `cli`.
Pages run no script but the trace's own, load nothing, and escape whatever comes from a file.
"""
