//! The pages, in a browser: what people do with them, and what must never happen on any of them.
//!
//! A walk is a script of `tests/browser`, with arguments. Each has an installation of its own, in one process: how it
//! is built is nothing that a page can tell.

use paperkey_tests::{Installation, browser::walk};

/// Tests out of walks.
macro_rules! walks {
    ($($name:ident: $script:literal),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                walk($script, &Installation::all_in_one().await).await;
            }
        )+
    };
}

walks! {
    the_first_hour_from_signing_up_to_signing_out_by_day: "first-hour light 1440",
    the_first_hour_on_a_phone_by_night: "first-hour dark 390",
    every_page_on_a_wide_screen_by_day: "pages light 1440",
    every_page_on_a_wide_screen_by_night: "pages dark 1440",
    every_page_on_a_phone_by_day: "pages light 390",
    every_page_on_a_phone_by_night: "pages dark 390",
    a_member_finds_no_door_that_is_not_theirs: "member",
    what_people_write_is_text_on_every_page: "xss",
    the_reference_asks_nobody_else_and_tries_calls_out: "reference",
    a_first_visit_takes_little: "cold",
    a_list_of_a_hundred_thousand_costs_what_one_of_fifty_costs: "many",
    the_keyboard_does_everything: "keyboard",
    no_script_can_read_the_session_and_every_tab_has_it: "session",
}
