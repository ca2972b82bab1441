//! UUIDs of swap headers: read from the configuration, or derived from a VM's name, so that a guest's fstab may
//! name either and a state directory that was wiped comes back with the same one.

/// Reads `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`; `None` when `text` isn't that.
pub(super) fn parse(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<&str> = text.split('-').collect();
    let digits = groups.concat();
    let lengths_fit = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]);
    // `from_str_radix` would take a leading sign.
    if !lengths_fit || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

/// The usual form.
pub(super) fn to_text(uuid: &[u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(*uuid));
    let [a, b, c, d, e] = [0..8, 8..12, 12..16, 16..20, 20..32].map(|group| &digits[group]);
    format!("{a}-{b}-{c}-{d}-{e}")
}

/// The UUID of a VM that was given none: FNV-1a over the name, marked as version 8 ("custom") of RFC 9562.
pub(super) fn of_name(name: &str) -> [u8; 16] {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = b"ballast swap "
        .iter()
        .chain(name.as_bytes())
        .fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let mut uuid = hash.to_be_bytes();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_in_the_usual_form_only() {
        let uuid = parse("00112233-4455-6677-8899-aAbBcCdDeEfF").unwrap();
        assert_eq!(uuid[..3], [0x00, 0x11, 0x22]);
        assert_eq!(uuid[15], 0xff);
        assert_eq!(to_text(&uuid), "00112233-4455-6677-8899-aabbccddeeff");
        for text in ["", "00112233445566778899aabbccddeeff", "+0112233-4455-6677-8899-aabbccddeeff"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_name_always_gives_the_same_uuid_of_version_8() {
        assert_eq!(of_name("web1"), of_name("web1"));
        assert_ne!(of_name("web1"), of_name("web2"));
        for name in ["a", "web1", "a-much-longer-name.example"] {
            let uuid = of_name(name);
            assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (8, 2), "{name}");
        }
    }
}
