"""Why a row is dropped, doubted, or spoken of: the words, and what to do about it.

A row is dropped for one reason. What is kept may be doubtful for several (``--strict`` refuses it), and may have been
put right on the way, or hold something worth knowing, which is no doubt.
"""

from __future__ import annotations

DROP_REASONS = {
    "missing_value": "a field is null or absent",
    "empty_completion": "chosen or rejected is empty",
    "no_prompt": "no shared leading message to be the prompt",
    "no_answer": "chosen or rejected has no message of the role 'assistant'",
    "not_text": "a message holds an image, a sound or another part that is not text",
    "images_do_not_fit": "its images and the places for them are not as many",
    "image_unreadable": "an image cannot be read",
    "answer_left_out": "the chat template leaves out what chosen or rejected says",
    "turns_not_told_apart": "the answers of a completion cannot be told from what lies between them",
    "prompt_scored": "the mask would take in the prompt",
    "prompt_too_long": "the prompt alone fills max_length",
    "one_answer": "there are fewer than two answers",
    "all_ties": "all of its answers score alike",
    "no_pairs": "it names no pairs",
    "equal_answers": "all of its pairs are of answers that are equal",
    "no_weight": "its weight is 0",
}
DROP_REMEDIES = {
    "missing_value": "fill in or remove the rows whose prompt, chosen or rejected is null",
    "empty_completion": "check that chosen and rejected hold the answers, and that the columns are the right ones",
    "no_prompt": "give the prompt in a column of its own, or begin chosen and rejected with the same messages",
    "no_answer": "name the roles as chat templates know them: system, user, assistant, tool",
    "not_text": "only text can be trained on, and images in prompts where the model takes them; remove these rows",
    "images_do_not_fit": "name as many images as the prompt has parts of the type image, or marks <image>, or none of "
    "these; and see that the chat template writes one for each, and that no text holds the token that stands for one",
    "image_unreadable": "see that the files are there, beside the data file or at the path given, and are images",
    "answer_left_out": "what would be scored is not what the row says; use a chat template that renders it "
    "(--chat_template_path)",
    "turns_not_told_apart": "let each completion be one answer, or use a chat template that renders the beginning of a "
    "conversation as it does the whole, or has {% generation %} blocks (--chat_template_path)",
    "prompt_scored": "the chat template renders the prompt otherwise once a completion follows; use one that does not",
    "prompt_too_long": "raise max_length (--max_length), or shorten the prompts",
    "one_answer": "a preference is between two answers to one prompt",
    "all_ties": "check that 'scores' or 'ranks' are the right ones",
    "no_pairs": "'pairs' should be a list of [chosen, rejected], numbers of answers",
    "equal_answers": "check that the answers are the right ones",
    "no_weight": "check that 'weight' or 'weights' are the right ones",
}
WARN_REASONS = {
    "identical": "chosen and rejected are identical",
    "identical_after_truncation": "chosen and rejected are identical once cut",
    "prompt_shortened": "the end of the prompt is left out",
    "prompt_repeated": "chosen and rejected repeat the prompt",
    "prompt_left_out": "the chat template leaves out something that the prompt says",
    "empty_prompt": "the prompt is empty",
    "prompt_answered": "the prompt ends with an answer, and the completions are other ones",
    "questions_differ": "chosen and rejected begin with different questions",
    "special_in_text": "a message holds a special token as text",
    "messages_as_text": "a text is a message list written as JSON",
    "reasoning_left_out": "the chat template leaves out an answer's reasoning",
    "tools_left_out": "the chat template leaves out the tools",
    "between_left_out": "the chat template leaves out what lies between the answers of a completion",
    "arguments_as_text": "a tool call's arguments are JSON text within JSON",
    "written_as_python": "a message is written as Python or JSON would write it",
    "spacing_changed": "the chat template changes the white space within a message",
    "kwargs_not_read": "chat_template_kwargs has what the chat template does not read",
    "end_not_scored": "the end of the answer is not scored",
    "header_scored": "the beginning of an answer is scored, too",
    "text_added": "the chat template writes text of its own behind an answer, and it is scored",
    "unanswered_turn": "a completion goes on after its last answer",
    "not_decoded": "the tokens do not decode to the text",
    "duplicate": "the same pair as a row before it",
    "contradicted": "the opposite of a row before it, or of a pair of its own",
    "scores_disagree": "one of its pairs prefers an answer that its scores or ranks say is worse",
}
WARN_EXPLANATIONS = {
    "identical": "such a pair says nothing about preference",
    "identical_after_truncation": "they differ only beyond max_length; a larger one would tell them apart",
    "prompt_shortened": "its last tokens are others when a completion follows, and the context ends before them; "
    "end the prompt where a token ends, or use a chat template that renders it alike in both cases",
    "prompt_repeated": "they begin with what is in the prompt column, which the model will read twice",
    "prompt_left_out": "the model answers without it; use a chat template that renders it (--chat_template_path)",
    "empty_prompt": "nothing is there for the completions to answer; is it in a column of another name?",
    "prompt_answered": "the model would read two answers to one question; join them where one goes on to the other",
    "questions_differ": "they answer different prompts, and what is preferred does not say which answer is better",
    "special_in_text": "the tokenizer takes it for the token itself, which begins or ends a turn there; write it "
    "otherwise, or remove the row",
    "messages_as_text": "it would be learnt as it stands; parse it into messages",
    "reasoning_left_out": "the answer alone is learnt; use a chat template that renders reasoning "
    "(--chat_template_path), or write it into the content as the model does",
    "tools_left_out": "the model is not told what it may call; use a chat template that renders them "
    "(--chat_template_path)",
    "between_left_out": "later answers follow without it; use a chat template that renders it (--chat_template_path)",
    "arguments_as_text": "quotation marks would be learnt with backslashes; give the arguments as an object",
    "written_as_python": "brackets and quotation marks of it would be learnt; give the content as one string",
    "spacing_changed": "code and lists lose their form; use a chat template that leaves it (--chat_template_path)",
    "kwargs_not_read": "it changes nothing; leave it out, or name it as the template does",
    "end_not_scored": "no token that ends a turn follows it in the chat template, so the model does not learn to stop; "
    "name the token that generation stops at (--end_token), or use a chat template for training (--chat_template_path)",
    "header_scored": "the chat template knows no add_generation_prompt, so what it writes before an answer counts as a "
    "part of the answer",
    "text_added": "it is learnt as the model's own words, before the end of the turn; use a chat template without it "
    "(--chat_template_path)",
    "unanswered_turn": "what comes after it is left out, for nothing there is scored",
    "not_decoded": "the tokenizer leaves out or changes some of it; look at the row",
    "duplicate": "it counts twice",
    "contradicted": "one prefers what the other rejects, and they cancel",
    "scores_disagree": "the pairs are what counts; check which of the two is right",
}
# What was put right, and what is worth knowing; sound, and no matter for --strict.
NOTES = {
    "arguments_parsed": "arguments of tool calls were parsed: they are JSON text, and the chat template takes objects",
    "arguments_written": "arguments of tool calls were written as JSON text, which the chat template takes",
    "parts_joined": "text parts were joined to one string: the chat template knows no parts",
    "parts_made": "contents were made lists of a text part, which the chat template takes",
    "content_filled": "a message without content was given an empty one, which the chat template needs",
    "header_cut": "the chat template writes the next turn's beginning after an answer; it is left out",
    "between_not_scored": "a completion has several turns: what is not the assistant's is context, and not scored",
    "answer_opened": "the chat template begins answers with text of its own, and it is scored",
    "end_appended": "the end token was appended to answers",
    "ended_already": "a text ends with the chat template's end of turn; no EOS token was appended",
    "one_bos": "a text begins with the BOS token, which the tokenizer would have put there again",
    "dated": "the chat template writes today's date",
}
