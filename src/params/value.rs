//! Values as they come from a user, kinds as the table asks for them, and the step from one to the other.

use std::fmt;

/// A parameter value as a params file, a command line or a `set` request gives it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value: an empty list in YAML, or a request to remove a parameter.
    Unset,
    /// True or false.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A floating-point number.
    Double(f64),
    /// Text.
    String(String),
    /// Integers.
    Ints(Vec<i64>),
    /// Floating-point numbers.
    Doubles(Vec<f64>),
    /// Texts.
    Strings(Vec<String>),
    /// A type that no parameter of this node has, by its name.
    Other(&'static str),
}

impl Value {
    /// The type, in words.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Unset => "no value",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Double(_) => "double",
            Value::String(_) => "string",
            Value::Ints(_) => "int list",
            Value::Doubles(_) => "double list",
            Value::Strings(_) => "string list",
            Value::Other(name) => name,
        }
    }

    /// Equality in which a NaN ("not set") equals a NaN.
    pub fn same(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Double(a), Value::Double(b)) => a == b || (a.is_nan() && b.is_nan()),
            (a, b) => a == b,
        }
    }

    /// Whether it is a list without items, of whatever type.
    pub fn is_empty_list(&self) -> bool {
        match self {
            Value::Ints(v) => v.is_empty(),
            Value::Doubles(v) => v.is_empty(),
            Value::Strings(v) => v.is_empty(),
            _ => false,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// The texts of a string list.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Value::Strings(s) => Some(s),
            _ => None,
        }
    }

    /// The value of a double.
    pub fn as_double(&self) -> Option<f64> {
        match self {
            Value::Double(x) => Some(*x),
            _ => None,
        }
    }

    /// The value of an integer.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Value::Int(x) => Some(*x),
            _ => None,
        }
    }
}

/// As YAML writes it, so that a message can be pasted into a params file.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list<T>(f: &mut fmt::Formatter<'_>, items: &[T], show: impl Fn(&T) -> String) -> fmt::Result {
            write!(f, "[{}]", items.iter().map(show).collect::<Vec<_>>().join(", "))
        }
        match self {
            Value::Unset => write!(f, "(no value)"),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Int(i) => write!(f, "{i}"),
            Value::Double(x) => write!(f, "{}", yaml_double(*x)),
            Value::String(s) => write!(f, "{}", yaml_string(s)),
            Value::Ints(v) => list(f, v, i64::to_string),
            Value::Doubles(v) => list(f, v, |x| yaml_double(*x)),
            Value::Strings(v) => list(f, v, |s| yaml_string(s)),
            Value::Other(name) => write!(f, "({name})"),
        }
    }
}

/// A double keeps its point, or YAML reads it back as an integer.
fn yaml_double(x: f64) -> String {
    match x {
        x if x.is_nan() => ".nan".into(),
        f64::INFINITY => ".inf".into(),
        f64::NEG_INFINITY => "-.inf".into(),
        x => format!("{x:?}"),
    }
}

/// Always quoted: `on`, `1e3` and `~` are strings too.
fn yaml_string(s: &str) -> String {
    let mut out = String::from('"');
    for c in s.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The type a parameter has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// True or false.
    Bool,
    /// An integer.
    Int,
    /// A floating-point number; an integer is promoted.
    Double,
    /// Text.
    String,
    /// Texts.
    StringList,
    /// Floating-point numbers; integers are promoted.
    DoubleList,
    /// Integers.
    IntList,
}

impl Kind {
    /// The type, in words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::Int => "int",
            Kind::Double => "double",
            Kind::String => "string",
            Kind::StringList => "string list",
            Kind::DoubleList => "double list",
            Kind::IntList => "int list",
        }
    }

    /// `value` as this kind, or why not. A list without items takes the type it should have: nobody can tell which one
    /// was meant, and `ros2 param load` says bool.
    pub fn coerce(self, value: Value) -> Result<Value, String> {
        let empty = value == Value::Unset || value.is_empty_list();
        Ok(match (self, value) {
            (Kind::StringList, _) if empty => Value::Strings(Vec::new()),
            (Kind::DoubleList, _) if empty => Value::Doubles(Vec::new()),
            (Kind::IntList, _) if empty => Value::Ints(Vec::new()),
            (Kind::Bool, v @ Value::Bool(_))
            | (Kind::Int, v @ Value::Int(_))
            | (Kind::Double, v @ Value::Double(_))
            | (Kind::String, v @ Value::String(_))
            | (Kind::StringList, v @ Value::Strings(_))
            | (Kind::DoubleList, v @ Value::Doubles(_))
            | (Kind::IntList, v @ Value::Ints(_)) => v,
            (Kind::Double, Value::Int(i)) => Value::Double(i as f64),
            (Kind::DoubleList, Value::Ints(v)) => Value::Doubles(v.into_iter().map(|i| i as f64).collect()),
            (kind, Value::Unset) => return Err(format!("expected {}, got no value", kind.name())),
            (kind, v) => return Err(format!("expected {}, got {} {v}", kind.name(), v.type_name())),
        })
    }
}

/// What is wrong with one parameter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parameter '{name}': {reason}")]
pub struct ParamError {
    /// The parameter, as the user wrote it.
    pub name: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl ParamError {
    /// An error about `name`.
    pub fn new(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), reason: reason.into() }
    }
}

impl crate::error::Blame for ParamError {
    fn fault(&self) -> crate::error::Fault {
        crate::error::Fault::Input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_promoted_to_doubles_and_nothing_else_is_converted() {
        assert_eq!(Kind::Double.coerce(Value::Int(2)), Ok(Value::Double(2.0)));
        assert_eq!(Kind::DoubleList.coerce(Value::Ints(vec![1, 2])), Ok(Value::Doubles(vec![1.0, 2.0])));
        assert_eq!(Kind::Int.coerce(Value::Double(2.0)), Err("expected int, got double 2.0".into()));
        assert_eq!(Kind::String.coerce(Value::Int(2)), Err("expected string, got int 2".into()));
        assert_eq!(Kind::Bool.coerce(Value::String("yes".into())), Err("expected bool, got string \"yes\"".into()));
        assert_eq!(Kind::IntList.coerce(Value::Unset), Ok(Value::Ints(vec![])));
        assert_eq!(Kind::StringList.coerce(Value::Ints(vec![])), Ok(Value::Strings(vec![])));
        assert_eq!(Kind::Int.coerce(Value::Ints(vec![])), Err("expected int, got int list []".into()));
        assert_eq!(Kind::Int.coerce(Value::Unset), Err("expected int, got no value".into()));
        assert!(Kind::StringList.coerce(Value::Other("byte list")).is_err());
    }

    #[test]
    fn values_print_as_yaml_reads_them_back() {
        assert_eq!(Value::Double(2.0).to_string(), "2.0");
        assert_eq!(Value::Double(f64::NAN).to_string(), ".nan");
        assert_eq!(Value::Double(1e-7).to_string(), "1e-7");
        assert_eq!(Value::String("a \"b\"\n\\".into()).to_string(), r#""a \"b\"\n\\""#);
        assert_eq!(Value::Strings(vec!["on".into(), "1".into()]).to_string(), r#"["on", "1"]"#);
    }
}
