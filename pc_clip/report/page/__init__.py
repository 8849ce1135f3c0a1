"""The report as a page: results and runs -> one HTML file, the same tables as Markdown, every figure as CSV.

    gather.py      what lies in files: results, runs, and what could not be read
    summary.py     variants, seeds, means, intervals
    words.py       how a figure is written
    charts.py      charts as inline SVG
    confusion.py   which classes are taken for which, before and after
    training.py    the logs of runs
    curves.py      figures over a setting
    pictures.py    pictures inside the page
    tables.py      Markdown and CSV
    page.py        all of it together, with page.html.j2 and page.css

Nothing here loads a model or encodes an image; a report of a whole study takes a second or two.
"""
