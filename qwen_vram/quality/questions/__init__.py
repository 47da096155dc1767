"""Questions of five categories with known answers, drawn from a seed.

Importing the modules loads the standard library only.

Modules:
    algebra        Basic algebra with whole numbers as results.
    chinese        Chinese questions about facts with a short answer.
    chinese_facts  Facts that the Chinese questions ask about, with the templates of the questions.
    draw           Drawing of questions by category and seed, for any model and for the bundled one.
    program        Python functions to write: tasks with a right solution, and calls with their values.
    question       A question with its known answer, and the kinds of grading.
    recall         Recall from a long text: facts between sentences of filler, of which one is asked for.
    table          Questions about a Markdown table: a cell, a largest value, a count, and a sum.
"""
