use super::*;

#[test]
fn why_something_fails_is_told_again_when_it_is_another_reason() {
    let mut complaint = Complaint::default();
    let mut is_new = |text: &'static str| complaint.is_new(&anyhow::anyhow!(text));
    assert_eq!(["a", "a", "b", "b", "a"].map(&mut is_new), [true, false, true, false, true]);
    complaint.forget();
    assert!(complaint.is_new(&anyhow::anyhow!("a")));
}
