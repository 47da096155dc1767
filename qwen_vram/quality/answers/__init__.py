"""Answers to questions: asking, grading, and running the programs among them.

Modules:
    ask            Asking of questions, and the share of right answers by category.
    grading        Grading of answers without a judge: exact texts, short texts, numbers and programs.
    sandbox        Running of a program that a model wrote, in a process with limits.
    sandbox_child  The process of one program: its limits, and the values of the calls.
"""
