//! From a conversation to tokens, and which of them the assistant says.
//!
//! # Which text is the assistant's
//! Templates do not say. A turn is what the text gains by it over the text that asks for it: the conversation before it
//! is rendered with the generation prompt, and once more with the turn; the difference is what the model would have to
//! write, its end-of-turn token included.
//!
//! # Which tokens
//! The whole text is encoded at once and the tokens are told apart by the text that they cover, for a text encoded in
//! parts may have other tokens at the seams: many tokenizers put a space before each part. One case is different. Where
//! a generation prompt ends in plain text, such as `Assistant: `, a token may reach over it into the answer (` Yes`);
//! generation could never continue with that token, because its prompt ends with the space. There the text is cut, so
//! that the tokens before an answer are those that generation starts from.

use super::super::DataError;
use super::conversation::{ASSISTANT, Conversation, Message, Text};
use super::error::{ChatError, Place};
use super::template::ChatTemplate;
use std::ops::Range;
use tokenizers::{PostProcessorWrapper, Tokenizer};

/// Tokens of a conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Example {
    pub ids: Vec<u32>,
    /// Which of them the assistant says; as long as `ids`.
    pub assistant: Vec<bool>,
}

impl Example {
    /// Whether any token that the assistant says has one before it to be predicted from.
    pub fn has_targets(&self) -> bool {
        self.assistant.iter().skip(1).any(|&assistant| assistant)
    }

    fn push(&mut self, id: u32, assistant: bool) {
        self.ids.push(id);
        self.assistant.push(assistant);
    }

    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.assistant.truncate(length);
    }
}

/// What turns conversations into tokens.
pub(super) struct Encoder<'a> {
    /// Adds nothing of its own, and its offsets cover all of a token's text.
    tokenizer: Tokenizer,
    /// Needed for messages.
    template: Option<&'a ChatTemplate>,
    /// Put before a prompt.
    bos: Option<u32>,
    /// Put after a completion; needed for completions.
    eos: Option<u32>,
    sequence_length: usize,
}

impl<'a> Encoder<'a> {
    pub fn new(
        tokenizer: &Tokenizer,
        template: Option<&'a ChatTemplate>,
        eos: Option<u32>,
        sequence_length: usize,
    ) -> Result<Self, ChatError> {
        let bos = match encode(tokenizer, "", true)?.get_ids() {
            [bos] => Some(*bos),
            _ => None,
        };
        let mut tokenizer = tokenizer.clone();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        Ok(Self { tokenizer, template, bos, eos, sequence_length })
    }

    /// The tokens of a conversation, cut at the sequence length; none where nothing to learn is left.
    pub fn example(&self, conversation: &Conversation) -> Result<Option<Example>, ChatError> {
        let mut example = match (&conversation.text, self.template, self.eos) {
            (Text::Messages(messages), Some(template), _) => {
                let (text, spans) = render(template, messages, &conversation.place)?;
                let mut example = Example::default();
                self.append(&text, &spans, &mut example)?;
                example
            }
            (Text::Completion { prompt, completion }, _, Some(eos)) => {
                let mut example = Example::default();
                self.bos.into_iter().for_each(|bos| example.push(bos, false));
                let text = [prompt.as_str(), completion].concat();
                let span = prompt.len()..text.len();
                self.append(&text, std::slice::from_ref(&span), &mut example)?;
                example.push(eos, true);
                example
            }
            // The caller has looked for both.
            (Text::Messages(_), None, _) | (Text::Completion { .. }, _, None) => return Ok(None),
        };
        example.truncate(self.sequence_length);
        Ok(example.has_targets().then_some(example))
    }

    /// Appends the tokens of `text`, of which `spans`, in order, are the assistant's.
    fn append(&self, text: &str, spans: &[Range<usize>], out: &mut Example) -> Result<(), ChatError> {
        let whole = encode(&self.tokenizer, text, false)?;
        let cuts = straddled(whole.get_offsets(), spans);
        if cuts.is_empty() {
            mark(&whole, 0, spans, out);
            return Ok(());
        }
        let mut start = 0;
        for end in cuts.into_iter().chain([text.len()]) {
            mark(&encode(&self.tokenizer, &text[start..end], false)?, start, spans, out);
            start = end;
        }
        Ok(())
    }
}

/// The starts of spans that lie inside a token.
fn straddled(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<usize> {
    let inside = |at: usize| offsets.iter().any(|&(start, end)| start < at && at < end);
    spans.iter().map(|span| span.start).filter(|&at| inside(at)).collect()
}

/// Appends the tokens of a text that begins at byte `start`: those that cover a byte of a span are the assistant's.
fn mark(encoding: &tokenizers::Encoding, start: usize, spans: &[Range<usize>], out: &mut Example) {
    for (&id, &(from, to)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
        // A token that the tokenizer put in covers nothing; it belongs to what follows.
        let (from, to) = (start + from, start + to.max(from + 1));
        out.push(id, spans.iter().any(|span| from < span.end && span.start < to));
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<tokenizers::Encoding, ChatError> {
    let failed = |source| DataError::Tokenizer { doing: "encoding a conversation", source };
    Ok(tokenizer.encode(text, special).map_err(failed)?)
}

/// The text of a conversation that ends with the assistant, and where in it the assistant speaks.
fn render(
    template: &ChatTemplate,
    messages: &[Message],
    place: &Place,
) -> Result<(String, Vec<Range<usize>>), ChatError> {
    let text_of = |count: usize, prompt: bool| {
        template.render(&messages[..count], prompt).map_err(|source| ChatError::Render {
            template: template.path().into(),
            place: place.clone(),
            message: count.max(1),
            source: Box::new(source),
        })
    };
    let text = text_of(messages.len(), false)?;
    let mut spans = Vec::new();
    for (before, _) in messages.iter().enumerate().filter(|(_, message)| message.role == ASSISTANT) {
        let asked = text_of(before, true)?;
        let answered = text_of(before + 1, false)?;
        let not_appending = |what| ChatError::NotAppending {
            template: template.path().into(),
            what,
            place: place.clone(),
            message: before + 1,
        };
        if !answered.starts_with(&asked) {
            return Err(not_appending("a turn does not begin with the prompt that asks for it"));
        }
        if !text.starts_with(&answered) {
            return Err(not_appending("a turn is written differently once others follow"));
        }
        spans.push(asked.len()..answered.len());
    }
    require_all(template, messages, &text, place)?;
    Ok((text, spans))
}

/// Refuses a conversation of which the template leaves a message out: one whose words do not appear and whose change
/// changes nothing.
fn require_all(
    template: &ChatTemplate,
    messages: &[Message],
    text: &str,
    place: &Place,
) -> Result<(), ChatError> {
    for (index, message) in messages.iter().enumerate() {
        if text.contains(message.content.trim()) {
            continue;
        }
        let mut changed = messages.to_vec();
        changed[index].content.push_str(" and more");
        // A template that fails on the other words has at least read them.
        if template.render(&changed, false).is_ok_and(|other| other == text) {
            return Err(ChatError::UnknownRole {
                template: template.path().into(),
                role: message.role.chars().take(40).collect(),
                place: place.clone(),
                message: index + 1,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
