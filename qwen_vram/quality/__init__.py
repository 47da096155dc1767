"""Quality of a loaded model: distance from a 16-bit model, and questions with answers.

Modules:
    answers/         Answers to questions: asking, grading, and running the programs among them.
    check            `check()`: measure what a configuration of a model costs in quality.
    distance         Distance of a model from its reference, with errors: KL divergence, top-1, perplexity.
    documents        Documents of the distance: token ids of questions with answers, then a sample text.
    intervals        Confidence intervals: of shares, and of figures over documents.
    passages         Original sample texts in English, Chinese and Python for the distance.
    questions/       Questions of five categories with known answers, drawn from a seed.
    reference        Logits of the reference on the disk: computed once, and read document by document.
    report           `QualityReport`: the distance and the answers of one model, as text and as plain data.
    teacher_forcing  Logits of a loaded model for the tokens of a document, through the cache of its plan.
    verdict          Verdicts: words for a distance by its mean KL divergence.
"""
