"""The wire format: requests as checked data, and answers and errors as JSON objects.

Modules:
    body         Bodies of requests: JSON of limited depth in UTF-8, finite numbers, whole characters.
    events       Events of a request, which an engine delivers in order.
    fields       Fields of a request, each checked by its type and range; `null` is as if it were absent.
    messages     Messages and tools of a chat request, checked and reduced to what a chat template reads.
    problem      The error of a request, with its status and OpenAI's error object.
    refusals     Errors of the library as errors of a request.
    replies      Answers as JSON objects of OpenAI's API: whole, and as chunks of a stream.
    requests     Requests of the chat and completion endpoints, as checked data.
    unsupported  Fields of requests that are refused by name, because they would change the answer.
"""
