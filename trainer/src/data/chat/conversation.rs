//! One line of a `.jsonl` file: a conversation, or a prompt with its completion.

use super::super::source::for_each_line;
use super::error::{ChatError, Place};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The role whose words are learnt.
pub const ASSISTANT: &str = "assistant";
/// Most messages of a conversation: each turn is rendered on its own, which takes the square of their number.
const MAX_MESSAGES: usize = 1024;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What a line holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text {
    /// Ends with an assistant's message: what follows the last of them has nothing to learn.
    Messages(Vec<Message>),
    Completion {
        prompt: String,
        completion: String,
    },
}

/// A line and where it was found.
#[derive(Debug, Clone)]
pub(super) struct Conversation {
    pub text: Text,
    pub place: Place,
}

/// The keys that are read; others are passed over.
#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Message>>,
    prompt: Option<String>,
    completion: Option<String>,
}

/// Appends the conversations of a file.
pub(super) fn read(path: &Path, out: &mut Vec<Conversation>) -> Result<(), ChatError> {
    for_each_line(path, |line, text| {
        let place = Place { path: path.to_path_buf(), line };
        out.push(Conversation { text: parse(text, &place)?, place });
        Ok(())
    })
}

fn parse(line: &str, place: &Place) -> Result<Text, ChatError> {
    let place = || place.clone();
    let line: Line = serde_json::from_str(line).map_err(|source| match source.is_data() {
        true => ChatError::Shape { place: place(), source },
        false => ChatError::NotJson { place: place(), source },
    })?;
    match line {
        Line { messages: Some(messages), .. } => turns(messages, place),
        Line { prompt: Some(prompt), completion: Some(completion), .. } if !completion.is_empty() => {
            Ok(Text::Completion { prompt, completion })
        }
        Line { prompt: Some(_), completion: Some(_), .. } => {
            Err(ChatError::Empty { what: "`completion`", place: place() })
        }
        _ => Err(ChatError::NeitherForm { place: place() }),
    }
}

/// Checks a conversation and leaves out what follows the assistant's last message.
fn turns(mut messages: Vec<Message>, place: impl Fn() -> Place) -> Result<Text, ChatError> {
    if messages.is_empty() {
        return Err(ChatError::Empty { what: "`messages`", place: place() });
    }
    if messages.len() > MAX_MESSAGES {
        let found = messages.len();
        return Err(ChatError::TooManyMessages { found, limit: MAX_MESSAGES, place: place() });
    }
    let Some(last) = messages.iter().rposition(|message| message.role == ASSISTANT) else {
        let mut roles: Vec<_> =
            messages.iter().map(|message| message.role.chars().take(40).collect::<String>()).collect();
        roles.sort();
        roles.dedup();
        roles.truncate(8);
        return Err(ChatError::NoAssistant { roles: roles.join(", "), place: place() });
    };
    messages.truncate(last + 1);
    if messages.iter().any(|message| message.role == ASSISTANT && message.content.is_empty()) {
        return Err(ChatError::Empty { what: "a message of the assistant", place: place() });
    }
    Ok(Text::Messages(messages))
}
