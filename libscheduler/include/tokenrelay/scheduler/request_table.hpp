// What may happen to a sequence in each of its states: the request FSM's table, which the compiler checks.
#pragma once

#include <array>

#include "tokenrelay/scheduler/request.hpp"

namespace tokenrelay::scheduler {
namespace request {

namespace why {
inline constexpr std::string_view resident = "it holds a slot already";
inline constexpr std::string_view not_resident = "it holds no slot";
inline constexpr std::string_view not_held = "it waits for no block";
inline constexpr std::string_view held = "it waits for a block that is being computed";
inline constexpr std::string_view no_more_rows = "it is over; no row of it is planned any more";
inline constexpr std::string_view leaving = "it gives its slot up; no row of it is planned any more";
inline constexpr std::string_view not_launched = "no launched step holds it";
inline constexpr std::string_view not_sampled = "nothing of it was sampled";
inline constexpr std::string_view keeps = "it runs; it keeps what it holds";
inline constexpr std::string_view planned = "its whole prompt is planned already";
inline constexpr std::string_view over = "it ended already";
inline constexpr std::string_view aborted = "it was aborted already";
inline constexpr std::string_view not_imported = "no transfer writes its blocks";
inline constexpr std::string_view imports = "its KV is not there yet; no step reads it";
inline constexpr std::string_view transfer = "a transfer may write its blocks";
inline constexpr std::string_view not_loading = "it loads nothing from host memory";
inline constexpr std::string_view loads = "its prefix is being loaded from host memory; no step reads it";
inline constexpr std::string_view preempted = "it was preempted already";
}  // namespace why

inline constexpr std::array table{
    fsm::to<Waiting, Admit, Prefilling>(),
    fsm::to<Waiting, Hold, Held>(),
    fsm::reject<Waiting, Wake>(why::not_held),
    fsm::reject<Waiting, Launch>(why::not_resident),
    fsm::reject<Waiting, LaunchFinal>(why::not_resident),
    fsm::reject<Waiting, Land>(why::not_launched),
    fsm::reject<Waiting, Finish>(why::not_sampled),
    fsm::reject<Waiting, Preempt>(why::not_resident),
    fsm::to<Waiting, Abort, Ended>(),
    fsm::to<Waiting, Import, Importing>(),
    fsm::reject<Waiting, Imported>(why::not_imported),
    fsm::reject<Waiting, Renounce>(why::not_imported),
    fsm::to<Waiting, Load, Loading>(),
    fsm::reject<Waiting, Arrive>(why::not_loading),
    fsm::reject<Waiting, Loaded>(why::not_loading),
    fsm::reject<Waiting, Expire>(why::not_loading),
    fsm::reject<Waiting, HandOver>(why::not_sampled),
    fsm::reject<Waiting, Settle>(why::not_resident),

    fsm::reject<Held, Admit>(why::held),
    fsm::reject<Held, Hold>(why::held),
    fsm::to<Held, Wake, Waiting>(),
    fsm::reject<Held, Launch>(why::not_resident),
    fsm::reject<Held, LaunchFinal>(why::not_resident),
    fsm::reject<Held, Land>(why::not_launched),
    fsm::reject<Held, Finish>(why::not_sampled),
    fsm::reject<Held, Preempt>(why::not_resident),
    fsm::to<Held, Abort, Ended>(),
    fsm::reject<Held, Import>(why::held),
    fsm::reject<Held, Imported>(why::not_imported),
    fsm::reject<Held, Renounce>(why::not_imported),
    fsm::reject<Held, Load>(why::held),
    fsm::reject<Held, Arrive>(why::not_loading),
    fsm::reject<Held, Loaded>(why::not_loading),
    fsm::reject<Held, Expire>(why::not_loading),
    fsm::reject<Held, HandOver>(why::not_sampled),
    fsm::reject<Held, Settle>(why::not_resident),

    fsm::reject<Prefilling, Admit>(why::resident),
    fsm::reject<Prefilling, Hold>(why::resident),
    fsm::reject<Prefilling, Wake>(why::not_held),
    fsm::to<Prefilling, Launch, Prefilling>(),
    fsm::to<Prefilling, LaunchFinal, Decoding>(),
    fsm::to<Prefilling, Land, Prefilling>(),
    fsm::reject<Prefilling, Finish>(why::not_sampled),
    fsm::to<Prefilling, Preempt, Preempting>(),
    fsm::to<Prefilling, Abort, Aborting>(),
    fsm::reject<Prefilling, Import>(why::resident),
    fsm::reject<Prefilling, Imported>(why::not_imported),
    fsm::reject<Prefilling, Renounce>(why::not_imported),
    fsm::reject<Prefilling, Load>(why::resident),
    fsm::reject<Prefilling, Arrive>(why::not_loading),
    fsm::reject<Prefilling, Loaded>(why::not_loading),
    fsm::reject<Prefilling, Expire>(why::not_loading),
    fsm::reject<Prefilling, HandOver>(why::not_sampled),
    fsm::reject<Prefilling, Settle>(why::keeps),

    fsm::reject<Decoding, Admit>(why::resident),
    fsm::reject<Decoding, Hold>(why::resident),
    fsm::reject<Decoding, Wake>(why::not_held),
    fsm::to<Decoding, Launch, Decoding>(),
    fsm::reject<Decoding, LaunchFinal>(why::planned),
    fsm::to<Decoding, Land, Decoding>(),
    fsm::to<Decoding, Finish, Finishing>(),
    fsm::to<Decoding, Preempt, Preempting>(),
    fsm::to<Decoding, Abort, Aborting>(),
    fsm::reject<Decoding, Import>(why::resident),
    fsm::reject<Decoding, Imported>(why::not_imported),
    fsm::reject<Decoding, Renounce>(why::not_imported),
    fsm::reject<Decoding, Load>(why::resident),
    fsm::reject<Decoding, Arrive>(why::not_loading),
    fsm::reject<Decoding, Loaded>(why::not_loading),
    fsm::reject<Decoding, Expire>(why::not_loading),
    fsm::to<Decoding, HandOver, Finishing>(),
    fsm::reject<Decoding, Settle>(why::keeps),

    fsm::reject<Preempting, Admit>(why::resident),
    fsm::reject<Preempting, Hold>(why::resident),
    fsm::reject<Preempting, Wake>(why::not_held),
    fsm::reject<Preempting, Launch>(why::leaving),
    fsm::reject<Preempting, LaunchFinal>(why::leaving),
    fsm::to<Preempting, Land, Preempting>(),
    fsm::to<Preempting, Finish, Finishing>(),
    fsm::reject<Preempting, Preempt>(why::preempted),
    fsm::to<Preempting, Abort, Aborting>(),
    fsm::reject<Preempting, Import>(why::resident),
    fsm::reject<Preempting, Imported>(why::not_imported),
    fsm::reject<Preempting, Renounce>(why::not_imported),
    fsm::reject<Preempting, Load>(why::resident),
    fsm::reject<Preempting, Arrive>(why::not_loading),
    fsm::reject<Preempting, Loaded>(why::not_loading),
    fsm::reject<Preempting, Expire>(why::not_loading),
    fsm::to<Preempting, HandOver, Finishing>(),
    fsm::to<Preempting, Settle, Waiting>(),

    fsm::reject<Importing, Admit>(why::resident),
    fsm::reject<Importing, Hold>(why::resident),
    fsm::reject<Importing, Wake>(why::not_held),
    fsm::reject<Importing, Launch>(why::imports),
    fsm::reject<Importing, LaunchFinal>(why::imports),
    fsm::reject<Importing, Land>(why::imports),
    fsm::reject<Importing, Finish>(why::not_sampled),
    fsm::reject<Importing, Preempt>(why::transfer),
    fsm::to<Importing, Abort, Aborting>(),
    fsm::reject<Importing, Import>(why::resident),
    fsm::to<Importing, Imported, Decoding>(),
    fsm::to<Importing, Renounce, Waiting>(),
    fsm::reject<Importing, Load>(why::resident),
    fsm::reject<Importing, Arrive>(why::not_loading),
    fsm::reject<Importing, Loaded>(why::not_loading),
    fsm::reject<Importing, Expire>(why::not_loading),
    fsm::reject<Importing, HandOver>(why::imports),
    fsm::reject<Importing, Settle>(why::transfer),

    fsm::reject<Loading, Admit>(why::resident),
    fsm::reject<Loading, Hold>(why::resident),
    fsm::reject<Loading, Wake>(why::not_held),
    fsm::reject<Loading, Launch>(why::loads),
    fsm::reject<Loading, LaunchFinal>(why::loads),
    fsm::reject<Loading, Land>(why::loads),
    fsm::reject<Loading, Finish>(why::not_sampled),
    fsm::to<Loading, Preempt, Waiting>(),
    fsm::to<Loading, Abort, Ended>(),
    fsm::reject<Loading, Import>(why::resident),
    fsm::reject<Loading, Imported>(why::not_imported),
    fsm::reject<Loading, Renounce>(why::not_imported),
    fsm::reject<Loading, Load>(why::resident),
    fsm::to<Loading, Arrive, Loading>(),
    fsm::to<Loading, Loaded, Prefilling>(),
    fsm::to<Loading, Expire, Waiting>(),
    fsm::reject<Loading, HandOver>(why::loads),
    fsm::reject<Loading, Settle>(why::keeps),

    fsm::reject<Finishing, Admit>(why::over),
    fsm::reject<Finishing, Hold>(why::over),
    fsm::reject<Finishing, Wake>(why::over),
    fsm::reject<Finishing, Launch>(why::no_more_rows),
    fsm::reject<Finishing, LaunchFinal>(why::no_more_rows),
    fsm::to<Finishing, Land, Finishing>(),
    fsm::reject<Finishing, Finish>(why::over),
    fsm::reject<Finishing, Preempt>(why::over),
    fsm::reject<Finishing, Abort>(why::over),
    fsm::reject<Finishing, Import>(why::over),
    fsm::reject<Finishing, Imported>(why::over),
    fsm::reject<Finishing, Renounce>(why::over),
    fsm::reject<Finishing, Load>(why::over),
    fsm::reject<Finishing, Arrive>(why::over),
    fsm::reject<Finishing, Loaded>(why::over),
    fsm::reject<Finishing, Expire>(why::over),
    fsm::reject<Finishing, HandOver>(why::over),
    fsm::to<Finishing, Settle, Ended>(),

    fsm::reject<Aborting, Admit>(why::aborted),
    fsm::reject<Aborting, Hold>(why::aborted),
    fsm::reject<Aborting, Wake>(why::aborted),
    fsm::reject<Aborting, Launch>(why::no_more_rows),
    fsm::reject<Aborting, LaunchFinal>(why::no_more_rows),
    fsm::to<Aborting, Land, Aborting>(),
    fsm::reject<Aborting, Finish>(why::aborted),
    fsm::reject<Aborting, Preempt>(why::aborted),
    fsm::reject<Aborting, Abort>(why::aborted),
    fsm::reject<Aborting, Import>(why::aborted),
    fsm::reject<Aborting, Imported>(why::aborted),
    fsm::reject<Aborting, Renounce>(why::aborted),
    fsm::reject<Aborting, Load>(why::aborted),
    fsm::reject<Aborting, Arrive>(why::aborted),
    fsm::reject<Aborting, Loaded>(why::aborted),
    fsm::reject<Aborting, Expire>(why::aborted),
    fsm::reject<Aborting, HandOver>(why::aborted),
    fsm::to<Aborting, Settle, Ended>(),

    fsm::reject<Ended, Admit>(why::over),
    fsm::reject<Ended, Hold>(why::over),
    fsm::reject<Ended, Wake>(why::over),
    fsm::reject<Ended, Launch>(why::over),
    fsm::reject<Ended, LaunchFinal>(why::over),
    fsm::reject<Ended, Land>(why::over),
    fsm::reject<Ended, Finish>(why::over),
    fsm::reject<Ended, Preempt>(why::over),
    fsm::reject<Ended, Abort>(why::over),
    fsm::reject<Ended, Import>(why::over),
    fsm::reject<Ended, Imported>(why::over),
    fsm::reject<Ended, Renounce>(why::over),
    fsm::reject<Ended, Load>(why::over),
    fsm::reject<Ended, Arrive>(why::over),
    fsm::reject<Ended, Loaded>(why::over),
    fsm::reject<Ended, Expire>(why::over),
    fsm::reject<Ended, HandOver>(why::over),
    fsm::reject<Ended, Settle>(why::over),
};

}  // namespace request

struct RequestFsm {
  static constexpr std::string_view name = "request";
  static constexpr std::string_view initial = "Waiting";
  using States =
      fsm::Types<request::Waiting, request::Held, request::Prefilling, request::Decoding, request::Preempting,
                 request::Importing, request::Loading, request::Finishing, request::Aborting, request::Ended>;
  using Events = fsm::Types<request::Admit, request::Hold, request::Wake, request::Launch, request::LaunchFinal,
                            request::Land, request::Finish, request::Preempt, request::Abort, request::Import,
                            request::Imported, request::Renounce, request::Load, request::Arrive, request::Loaded,
                            request::Expire, request::HandOver, request::Settle>;
  static constexpr std::span<const fsm::Row> table{request::table};
};
static_assert(fsm::verified<RequestFsm>());

}  // namespace tokenrelay::scheduler
