//! What chat templates call besides Jinja itself, as the `transformers` library offers it.

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};
use std::io::{self, Write};

/// Spaces that `tojson` indents by at most.
const MAX_INDENT: usize = 16;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Adds the functions and filters to an environment.
pub(super) fn add(environment: &mut Environment) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    set_clock(environment, None);
}

/// Sets what `strftime_now` takes for now, in seconds since 1970 in UTC; without one it reads the clock.
pub(super) fn set_clock(environment: &mut Environment, seconds: Option<i64>) {
    environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
        let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seconds = seconds.unwrap_or_else(|| now().map_or(0, |passed| passed.as_secs() as i64));
        strftime(&format, seconds).map_err(|code| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know %{code}"))
        })
    });
}

/// Writes a date as C's `strftime` does in its own language; the error is a code that is not known.
fn strftime(format: &str, seconds: i64) -> Result<String, String> {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let half_day = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let code = characters.next().map(String::from).unwrap_or_default();
        out.push_str(&match code.as_str() {
            "Y" => year.to_string(),
            "y" => format!("{:02}", year.rem_euclid(100)),
            "m" => format!("{month:02}"),
            "d" => format!("{day:02}"),
            "e" => format!("{day:2}"),
            "j" => format!("{:03}", days - days_before(year) + 1),
            "B" => month_name.into(),
            "b" | "h" => month_name[..3].into(),
            "A" => weekday.into(),
            "a" => weekday[..3].into(),
            "H" => format!("{hour:02}"),
            "I" => format!("{half_day:02}"),
            "p" => if hour < 12 { "AM" } else { "PM" }.into(),
            "M" => format!("{minute:02}"),
            "S" => format!("{:02}", second % 60),
            "F" => format!("{year}-{month:02}-{day:02}"),
            "T" => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            "Z" => "UTC".into(),
            "%" => "%".into(),
            _ => return Err(code),
        });
    }
    Ok(out)
}

/// Days from 1970-01-01 to the first day of a year of the Gregorian calendar.
fn days_before(year: i64) -> i64 {
    let past = year - 1;
    365 * (year - 1970) + (past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400)) - 477
}

/// Year, month and day of the day that is `days` after 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    // A year has 365.2425 days: the guess is off by one at most.
    let mut year = 1970 + (days * 400).div_euclid(146_097);
    while days < days_before(year) {
        year -= 1;
    }
    while days >= days_before(year + 1) {
        year += 1;
    }
    let leap = i64::from(days_before(year + 1) - days_before(year) == 366);
    let (mut day, mut month) = (days - days_before(year), 1);
    for length in [31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: nothing is escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "tojson failed").with_source(error)
    };
    let indent: Option<usize> = options.get("indent")?;
    // What a template may say besides; it is so already.
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson knows no ensure_ascii=true"));
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    match indent {
        Some(spaces) => {
            let spaces = " ".repeat(spaces.min(MAX_INDENT));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => {
            value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?;
        }
    }
    // JSON's writer gives UTF-8, so nothing is lost.
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// JSON on one line with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        CompactFormatter.begin_object_value(writer)?;
        writer.write_all(b" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values are those of Python's `datetime.fromtimestamp(s, timezone.utc).strftime`.
    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 001 Thu"),
            (951_782_400, "2000-02-29 060 Tue"),
            (1_721_952_000, "2024-07-26 208 Fri"),
            (1_735_689_599, "2024-12-31 366 Tue"),
            (4_107_542_400, "2100-03-01 060 Mon"),
            (-86_400, "1969-12-31 365 Wed"),
        ] {
            assert_eq!(strftime("%F %j %a", seconds).unwrap(), expected);
        }
        let all = strftime("%d %b %Y|%A, %B %e|%y %m|%H:%M:%S %I %p|%T%%", 1_721_999_106).unwrap();
        assert_eq!(all, "26 Jul 2024|Friday, July 26|24 07|13:05:06 01 PM|13:05:06%");
        assert_eq!(strftime("%q", 0).unwrap_err(), "q");
        assert_eq!(strftime("%", 0).unwrap_err(), "");
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = civil(-150_000);
        for days in -149_999..150_000 {
            let (year, month, day) = civil(days);
            let next = (last.0, last.1, last.2 + 1);
            let month_after = day == 1 && last.2 >= 28 && (year * 12 + month) == last.0 * 12 + last.1 + 1;
            assert!((year, month, day) == next || month_after, "{days}: {last:?} {year}-{month}-{day}");
            assert!((1..=31).contains(&day));
            last = (year, month, day);
        }
    }

    /// Expected values are those of Python's `json.dumps`.
    #[test]
    fn json_is_pythons() {
        let mut environment = Environment::new();
        add(&mut environment);
        let render = |source| environment.render_str(source, ()).unwrap();
        assert_eq!(render("{{ '<a> \"é\"\n' | tojson }}"), r#""<a> \"é\"\n""#);
        assert_eq!(render("{{ {'b': [1, 2], 'a': none} | tojson }}"), r#"{"b": [1, 2], "a": null}"#);
        assert_eq!(render("{{ [1] | tojson(indent=2) }}"), "[\n  1\n]");
        assert!(environment.render_str("{{ 1 | tojson(ensure_ascii=true) }}", ()).is_err());
        assert!(environment.render_str("{{ 1 | tojson(other=1) }}", ()).is_err());
    }
}
